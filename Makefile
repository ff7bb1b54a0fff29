# Postern. The targets one wants:
#
#   make demo       a host joins through its own dialed tunnel and answers SQL; Ctrl-C ends it
#   make test       everything that proves it works (installs what it lacks)
#   make build      agentd, controlplane and postern in bin/
#   make e2e-long   the end-to-end tests at full length: 100,000 statements in one session, one that is silent
#                   for 3 minutes behind nginx, 3 minutes over a slow link, 224 kills and 48 power cuts in the midst of checkpoints
#   make vault-test the tests with Vault against a real one, which is built for it
#   make s3-test    the object store on a real S3 server, which is built for it
#   make mysql-test the suite of engines and the attacks on a real MySQL, which is fetched from Debian's
#                   newer suites into /opt/postern-mysql, or bin/mysql if not root (180 MB)
#   make host-test  the packages on really booted Debian hosts (systemd-nspawn): install, upgrade, remove,
#                   restarts, watchdog, reboot, bad days; as root, a few minutes each; SUITES="trixie bookworm",
#                   RUN=TestName for some, POSTERN_LONG=1 for 100 restarts
#   make clients    clients that are large to install, through the whole system: JDBC,
#                   node-postgres (from npm), pgx's own tests, JupyterLab's client library and, as root, DuckDB on a mount (from npm)
#   make upgrade-test  this version with the one before (packaging/previous): each part with each, and in place
#   make race       the Go tests alone, with the race detector
#   make lint       gofumpt, vet, staticcheck
#   make fuzz       every fuzz target, FUZZTIME each (default 5m)
#   make bench      the figures, as ratios measured in one run
#   make packages   .deb and .rpm for amd64 and arm64 in dist/, each with its SBOM; ARCHES="amd64" for one
#   make charts     check packaging/helm against Kubernetes' types and packaging/compose against Compose's schema
#   make proto      generate the code from proto/postern/v1/*.proto
#   make clean

GO       ?= go
RELEASE  ?= 0.1.0-dev
FUZZTIME ?= 5m
LDFLAGS  := -s -w -X github.com/postern-dev/postern/proto.release=$(RELEASE)
export PATH := $(CURDIR)/.go/bin:$(PATH):/usr/local/go/bin:/usr/sbin:/sbin

.PHONY: build demo test e2e-long clients vault-test s3-test mysql-test host-test upgrade-test race lint fuzz bench packages charts proto clean deps

build: deps
	@mkdir -p bin
	CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=auto -ldflags '$(LDFLAGS)' -o bin/ ./agentd ./controlplane ./client/postern

deps:
	@packaging/dev/deps.sh go

demo: build
	@packaging/dev/deps.sh postgresql
	@$(GO) run ./e2e/demo -bin bin

test:
	@packaging/dev/test.sh

e2e-long:
	@packaging/dev/deps.sh tests linuxsource
	POSTERN_LONG=1 $(GO) test -count=1 -timeout 60m -v ./e2e
	POSTERN_LONG=1 $(GO) test -count=1 -timeout 30m -v -run TestOneOwnersManyStatements ./agentd/sqlsession
	POSTERN_LONG=1 $(GO) test -count=1 -timeout 30m -v -run TestWire ./agentd/sqlsession/adversary
	POSTERN_LONG=1 $(GO) test -count=1 -timeout 60m -v ./agentd/attach/fusefs
	POSTERN_LONG=1 $(GO) test -count=1 -timeout 60m -v -run TestExercise ./agentd/attach/bucketfs
	POSTERN_LONG=1 $(GO) test -count=1 -timeout 30m -v -run AtEveryStep ./agentd/checkpoint/pagestore
	POSTERN_LONG=1 $(GO) test -count=1 -timeout 30m -v -run TestALargeKernel ./agentd

vault-test:
	@packaging/dev/deps.sh go postgresql
	@mkdir -p bin
	cd e2e/vaultserver && CGO_ENABLED=0 $(GO) build -o ../../bin/vaultserver .
	POSTERN_VAULTSERVER=$(CURDIR)/bin/vaultserver $(GO) test -tags realvault -run 'TestRealVault|TestSimulatedVault' -v ./e2e

s3-test:
	@packaging/dev/deps.sh go postgresql
	@mkdir -p bin
	cd e2e/s3server && CGO_ENABLED=0 $(GO) build -o ../../bin/versitygw github.com/versity/versitygw/cmd/versitygw
	POSTERN_S3SERVER=$(CURDIR)/bin/versitygw $(GO) test -tags reals3 -v ./controlplane/blob ./agentd/attach/bucket
	POSTERN_S3SERVER=$(CURDIR)/bin/versitygw $(GO) test -tags reals3 -run TestRealBucket -v ./agentd
	POSTERN_S3SERVER=$(CURDIR)/bin/versitygw $(GO) test -tags reals3 -run 'TestKill|TestRealBucket' -v ./controlplane/workspace
	POSTERN_S3SERVER=$(CURDIR)/bin/versitygw $(GO) test -tags reals3 -run TestRealS3 -v ./e2e

# The server runs as the user mysql, which can't look into every home directory.
MYSQL ?= $(if $(filter 0,$(shell id -u)),/opt/postern-mysql,$(CURDIR)/bin/mysql)
mysql-test:
	@packaging/dev/deps.sh go mariadb
	@packaging/dev/mysql.sh $(MYSQL)
	POSTERN_MYSQL=$(MYSQL) $(GO) test -tags realmysql -timeout 20m -skip 'Maria|SQLite' -v ./agentd/sqlsession/enginetest

SUITES ?= trixie bookworm
host-test:
	@packaging/dev/deps.sh go gcc testhost
	@CRIU_PRIVATE=1 packaging/dev/criu.sh
	POSTERN_SUITES="$(SUITES)" $(GO) test -tags hosttest -count 1 -timeout 120m -v $(if $(RUN),-run '$(RUN)') ./e2e/hosttest

upgrade-test:
	@packaging/dev/deps.sh go postgresql jupyter
	$(GO) test -tags upgrade -count 1 -timeout 30m -v ./e2e/upgrade

clients:
	@packaging/dev/deps.sh go postgresql jupyter bigclients
	$(GO) test -tags clients -timeout 30m -v -run 'TestBigClients|TestJDBCMetadata|TestPgxSuite|TestJupyterLabClient|TestDuckDB' ./e2e

# With everything under it: `make test` leaves a compiler out.
race:
	$(GO) test -race ./...

lint:
	@out=$$(git ls-files '*.go' ':!proto/postern' | xargs $(GO) tool gofumpt -l); test -z "$$out" || { echo "lint: run go tool gofumpt -w on:" $$out >&2; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...

fuzz:
	@packaging/dev/fuzz.sh $(FUZZTIME)

bench: build
	@packaging/dev/deps.sh gcc postgresql jupyter
	@[ "$$(id -u)" != 0 ] || packaging/dev/deps.sh criu sshfs
	@$(GO) run ./e2e/bench -bin bin $(BENCH)

packages: deps
	@RELEASE=$(RELEASE) packaging/packages.sh $(ARCHES)

charts: deps
	cd packaging/helm/check && $(GO) run .

proto:
	$(GO) run ./proto/internal/protogen

clean:
	rm -rf bin dist
