# A Mycel node:
#   docker build -t mycel .
#   docker run -p 4800:4800 -v mycel:/var/lib/mycel -e MYCEL_ANNOUNCE=/ip4/THIS_MACHINE/tcp/4800 mycel
#
# torch comes as its CPU build from PyTorch's own index. For a GPU image say
#   --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130
# scripts/dockerfile_steps.py runs these very steps in a clean root where no container engine is at hand.

ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
# A C compiler, for the kernel of quantized sums.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev
COPY pyproject.toml constraints.txt ./
RUN python3 -m venv /opt/mycel
RUN /opt/mycel/bin/pip install --no-cache-dir --extra-index-url "${TORCH_INDEX}" -c constraints.txt "$(grep ^torch== constraints.txt)"
COPY README.md LICENSE ./
COPY src src
COPY protocol protocol
COPY dht dht
COPY compute compute
COPY node node
COPY simnet simnet
RUN /opt/mycel/bin/pip install --no-cache-dir -c constraints.txt .

FROM ${BASE}
RUN useradd --uid 4800 --shell /usr/sbin/nologin --home-dir /var/lib/mycel --create-home mycel
COPY --from=build /opt/mycel /opt/mycel
ENV PATH=/opt/mycel/bin:/usr/local/bin:/usr/bin:/bin
ENV MYCEL_HOME=/var/lib/mycel
ENV MYCEL_LISTEN=/ip4/0.0.0.0/tcp/4800
USER mycel
WORKDIR /var/lib/mycel
VOLUME /var/lib/mycel
EXPOSE 4800
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD ["mycel", "status"]
STOPSIGNAL SIGTERM
CMD ["mycel", "up"]
