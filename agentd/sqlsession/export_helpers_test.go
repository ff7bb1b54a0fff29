package sqlsession_test

import "github.com/postern-dev/postern/agentd/sqlsession"

const helperParentArg = "helper-parent"

func helperParent() int { return 0 }

func sqlsessionConfig() sqlsession.Config { return sqlsession.Config{} }
