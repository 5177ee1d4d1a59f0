"""`tnt bench`: what the memory operations and whole training steps cost, beside what else there is."""
