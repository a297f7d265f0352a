"""Files on a drive as a place to rest: the files, the pipeline that moves them, and the array-like that a state holds."""
