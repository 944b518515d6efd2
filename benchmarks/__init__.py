"""One file per question, one JSON line per answer; results with their command stand in RESULTS.md."""
