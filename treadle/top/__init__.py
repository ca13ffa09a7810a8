"""`treadle top`: a service at a glance, in a terminal. Needs the extra `top`; `import treadle` brings none of it."""
