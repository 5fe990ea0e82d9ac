"""What routing does to steps: measured per step, summarised with intervals, graded in free running."""
