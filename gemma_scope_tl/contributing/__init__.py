"""Registry files for a user's own SAEs: drafted from the files of a folder or repository, and checked against them."""
