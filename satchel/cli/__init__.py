"""The command line: one file a verb. Torch is slow to import, so a verb imports what it calls when it is called."""
