"""The command line `firp`."""
