"""Where the work of a model runs, what passes between integers and float, and what a file takes."""
