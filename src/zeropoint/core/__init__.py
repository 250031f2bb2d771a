"""Values that every layer uses: errors, flags, dtypes, specs, configurations."""
