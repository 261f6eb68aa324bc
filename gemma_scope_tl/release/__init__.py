"""Publishing SAEs: writing them in the layouts that people load, and uploading them in one commit."""
