"""Publishing SAEs: writing repositories in common layouts, and uploading each in one commit."""
