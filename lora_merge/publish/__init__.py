"""Publishing an adapter folder: allow-listed files, scanned for secrets, in one commit."""
