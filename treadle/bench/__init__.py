"""`treadle bench serve`: an open-loop load generator for servers of this project and of others."""
