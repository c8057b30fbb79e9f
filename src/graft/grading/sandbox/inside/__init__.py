"""The part that runs inside the sandbox. Imports the standard library alone: nothing else of graft is there."""
