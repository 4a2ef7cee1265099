# One image for the agent, the controller and the switch's DaemonSet. `make image BASE=… TAG=…` builds it.
# The base is Debian 12, Ubuntu 24.04 or newer. The build trusts the certificates of the base (/etc/ssl/certs): behind
# a proxy that opens TLS, use a base that has the proxy's authority.
ARG BASE=debian:12-slim

FROM ${BASE} AS build
ENV DEBIAN_FRONTEND=noninteractive PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN apt-get -q -o Acquire::Retries=3 update && \
    apt-get -qy --no-install-recommends install ca-certificates python3 python3-venv && update-ca-certificates && \
    rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt constraints-build.txt ./
# The libraries first, checked by hash: a change of the code then does not fetch them again. The asynchronous half of
# the Kubernetes client (68 MB) is not used.
RUN python3 -m venv /opt/ovsmesh && \
    /opt/ovsmesh/bin/pip install --retries 5 --require-hashes --only-binary :all: -r constraints-build.txt && \
    /opt/ovsmesh/bin/pip install --retries 5 --require-hashes --no-build-isolation --use-pep517 -r constraints.txt && \
    rm -r /opt/ovsmesh/lib/python3*/site-packages/kubernetes/aio
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY ovsmesh ovsmesh
RUN /opt/ovsmesh/bin/pip install --no-deps --no-build-isolation --use-pep517 . && \
    /opt/ovsmesh/bin/pip uninstall -y setuptools pip && \
    /opt/ovsmesh/bin/ovsmesh --version

FROM ${BASE}
# policy-rc.d keeps init scripts from starting a switch here. The database that the package made is removed: with it every
# node would have the same system id. So are package lists and documents, which nothing reads later.
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
# The agent and the switch need root. The controller's manifest runs it as another user.
ENTRYPOINT ["ovsmesh"]
CMD ["--help"]
