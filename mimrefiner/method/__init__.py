"""The method of the paper: heads on blocks, the queue of neighbours, the loss."""
