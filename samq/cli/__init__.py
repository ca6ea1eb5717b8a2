"""The command line: `app` lists the commands; each other module holds a group of them or what they share."""
