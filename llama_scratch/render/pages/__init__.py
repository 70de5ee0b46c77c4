"""What the microscope found, as pages: a module a theme."""
