"""Commands that make random checkpoints and measure."""
