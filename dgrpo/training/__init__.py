"""The verbs of the trainer's loop and the objects that they work on."""
