"""The end of a decode step: scores processed, tokens chosen, the state advanced."""
