package sqlsession_test

const helperParentArg = "helper-parent"

func helperParent() int { return 0 }
