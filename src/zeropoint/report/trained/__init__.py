"""Is a converted model what was trained, and is it better than the one before?"""
