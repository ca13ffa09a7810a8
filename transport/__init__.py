"""The wire: message structs, codecs, sockets, liveness. Imports no other room and no torch."""
