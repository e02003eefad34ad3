"""A page on which people label: `polar-ft label`, what it writes, and how well the labellers agree."""
