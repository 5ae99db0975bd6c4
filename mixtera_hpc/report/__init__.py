"""Reports: numbers, plots and an HTML page from the recorded metrics of runs."""
