"""The networks. A new one: a file here, its fields in `imgcls.recipe`, a branch in `build`."""
