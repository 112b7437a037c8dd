"""The actor runtime: actors, handles, object refs and supervision."""
