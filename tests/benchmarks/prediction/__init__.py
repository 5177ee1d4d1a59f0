"""What `predict.py` is made of: recording, reading what the compiler made, and a model of one multiprocessor."""
