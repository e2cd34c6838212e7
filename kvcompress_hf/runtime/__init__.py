"""One cache at work: a forward pass of attention, and the packing and compression that follow it."""
