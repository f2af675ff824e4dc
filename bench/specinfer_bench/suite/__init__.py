"""`make bench`: the short form of every benchmark, its files, and the page that shows them."""
