"""Held-out loss and answers of the base, each local and the global model, side by side; and the merged model itself."""
