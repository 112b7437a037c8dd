"""Values without I/O: refs, rings, blocksets, INode trees."""
