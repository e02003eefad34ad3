"""`polar-ft score`: the rewards of a data set of any size."""
