"""Draft-free speculation: several positions of a row in one step, drafted from the row's own ids."""
