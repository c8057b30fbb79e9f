"""What is wrong with a run, told from its folder alone: `evidence.py` reads it once, each check judges one thing."""
