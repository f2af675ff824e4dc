"""The `specinfer` command. Importing this package loads neither rich, typer nor torch."""
