"""What the program needs of the operating system, apart from any model."""
