"""Registry files for SAEs of one's own: drafted from what is there, checked against what is there."""
