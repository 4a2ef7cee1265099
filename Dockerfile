# One image for the agent, the controller and the switch's DaemonSet. Any base of Debian 12 or
# Ubuntu 24.04 or newer; `make image BASE=… TAG=…`. What the base trusts (/etc/ssl/certs) is what the build trusts,
# so behind a proxy that opens TLS a base that knows its authority is all that is needed.
ARG BASE=debian:12-slim

FROM ${BASE} AS build
ENV DEBIAN_FRONTEND=noninteractive PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN apt-get -q -o Acquire::Retries=3 update && \
    apt-get -qy --no-install-recommends install ca-certificates python3 python3-venv && update-ca-certificates && \
    rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY setup.cfg pyproject.toml ./
# The libraries first, by a package with nothing in it: a change of our code does not fetch them anew.
RUN mkdir ovsmesh && touch README.md LICENSE && echo '__version__ = "0"' >ovsmesh/__init__.py && \
    python3 -m venv /opt/ovsmesh && /opt/ovsmesh/bin/pip install --retries 5 . && rm -rf build ./*.egg-info
COPY README.md LICENSE ./
COPY ovsmesh ovsmesh
RUN /opt/ovsmesh/bin/pip install --no-deps --force-reinstall . && \
    /opt/ovsmesh/bin/pip uninstall -y setuptools pip && \
    /opt/ovsmesh/bin/ovsmesh --version

FROM ${BASE}
# The lists of packages are of no use later, and no init script may start a switch here. A database made by a
# package's script would give every node of every cluster one system id.
RUN export DEBIAN_FRONTEND=noninteractive && \
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d && chmod 755 /usr/sbin/policy-rc.d && \
    apt-get -q -o Acquire::Retries=3 update && \
    apt-get -qy --no-install-recommends install \
        containernetworking-plugins iproute2 iptables kmod nftables openvswitch-switch python3 && \
    find /usr/lib/cni -type f ! -name bridge ! -name host-local ! -name loopback ! -name portmap -delete && \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/log/* \
        /etc/openvswitch /var/lib/openvswitch /usr/share/doc/* /usr/share/man/* && \
    mkdir /etc/openvswitch /var/lib/openvswitch
COPY --from=build /opt/ovsmesh /opt/ovsmesh
ENV PATH=/opt/ovsmesh/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin PYTHONUNBUFFERED=1
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title=ovsmesh \
      org.opencontainers.image.description="One flat network for the pods and containers of many hosts, on Open vSwitch and GRE" \
      org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# The agent and the switch need root; the controller's manifest gives it another user (runAsNonRoot).
ENTRYPOINT ["ovsmesh"]
CMD ["--help"]
