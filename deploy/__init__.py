"""A fleet on one machine: the only place that sees both sides.

cli demo loop season    `milpa-fleet`; the whole loop, its steps for any task, and a season at a site
fleet processes broker  real processes with folders, secrets and logs; mosquitto's settings
secrets images/         docker-compose.yml's secrets and images          setup.sh   what the Makefile installs
"""
