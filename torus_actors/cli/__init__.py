"""The commands: torus-node, torusctl, torusblk."""
