"""What every benchmark needs and none is about: flags, turns, result files, tables, model pairs, a client."""
