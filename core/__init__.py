"""What every stage uses and no paper speaks of: settings, names, artifacts, processes, messages."""
