"""Everything that is made from the bundled model and suite: what it is, whether it is up to date, and one command."""
