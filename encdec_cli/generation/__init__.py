"""From text to text: lines to jobs, jobs to hypotheses, hypotheses to lines."""
