"""One process per GPU: serves streams, retrains students and runs profiling trials within granted shares."""
