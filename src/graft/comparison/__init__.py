"""Several algorithms on the same rows, seeds, warm start and budget of generated tokens: `graft compare`."""
