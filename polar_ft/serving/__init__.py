"""The embedded HTTP server and its playground."""
