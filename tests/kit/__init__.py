"""Tools that tests of every level share."""
