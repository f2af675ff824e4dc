"""The dashboards as typed data, and what makes Grafana's JSON of them."""
